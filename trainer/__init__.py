"""What needs torch: backbones, learning methods, the training loop, and the site agent."""
