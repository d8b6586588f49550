"""The three stages: each is its data and its loss, handed to train.py."""
