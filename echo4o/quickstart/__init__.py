"""Shapes-4o, a miniature of Echo-4o-Image, and the loop that trains, draws and scores a tiny BAGEL on it."""
