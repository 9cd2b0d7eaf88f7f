"""What is compared: sets of images, samples, references, their classes."""
