"""The nouns of Gristmill: what flows between stages, and what is written to disk. Imports nothing of ours."""
