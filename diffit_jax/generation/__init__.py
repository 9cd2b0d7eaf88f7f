"""From weights to images: what sample, evaluation and training grids share."""
