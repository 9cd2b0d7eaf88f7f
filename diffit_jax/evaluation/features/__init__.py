"""From images to features: the feature spaces, and what they are made of."""

SPACES = ("inception", "digits", "pixels")
RESIZE_RULES = ("tf1", "pytorch_fid")  # for Inception, see `resize`
