"""Models made smaller or sparser: fewer active neurons, fewer weights."""
