"""What many mixers and models need: norms, feature maps, a loss in chunks."""
