"""A small trainer on Megatron Core that starts from, and ends with, a Hugging Face folder.

Read `run/loop.py` from top to bottom; its neighbours each do one thing it names.
"""
