"""What the networks are trained to do, as functions of arrays alone."""
