"""lm: a model-parallel language-model trainer in JAX."""
