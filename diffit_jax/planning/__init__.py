"""Plans: what a train step needs on devices that are not there."""
