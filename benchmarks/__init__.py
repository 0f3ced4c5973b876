"""Measurements that anyone can repeat: speed and accuracy."""
