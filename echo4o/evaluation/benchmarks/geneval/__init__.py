"""GenEval (arXiv 2310.11513): prompts about objects, counts, colours and positions, judged by a detector."""
