"""Distillation: a student learns from a teacher's distributions over the vocabulary."""
