"""Data: TFDS builders that prepare once, and the Grain pipeline that reads."""
