"""Speed and memory, measured; nothing here asserts on time."""
