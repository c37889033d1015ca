"""Generators and discriminators, and the layers, augmentation and average that they share."""
