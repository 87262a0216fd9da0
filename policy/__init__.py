"""Robots that learn: demonstrations, policies that act by drifting or diffusion, their training and evaluation."""
