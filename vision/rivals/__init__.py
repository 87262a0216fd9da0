"""What drifting is compared with, on the same transformer: flow matching, MeanFlow and a GAN."""
