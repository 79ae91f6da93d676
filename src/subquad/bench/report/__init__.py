"""Reports for a person: one HTML file that needs nothing beside it, and its plots."""
