"""LM heads.

head.py                 `LMHead`, and the map from products h Wᵀ to logits
head_of_model.py        the head of a model of transformers
known_models.py         the classes of models whose head is known
vocabulary_parallel.py  a head whose rows a group of processes shares
"""
