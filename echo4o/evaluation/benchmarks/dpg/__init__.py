"""DPG-Bench (arXiv 2403.05135): long prompts, judged by yes/no questions that depend on each other."""
