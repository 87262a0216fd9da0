"""Images: the one-step generator, the feature encoder, and the programs that train, sample and measure them."""
