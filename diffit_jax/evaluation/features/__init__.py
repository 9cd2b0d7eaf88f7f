"""From images to numbers: the Inception and the other feature spaces."""
