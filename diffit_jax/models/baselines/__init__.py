"""Networks that the paper compares DiffiT with."""
