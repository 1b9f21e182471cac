"""The built-in base model: a small Llama trained from scratch on this machine.

``corpus`` reads the training text, ``tokens`` makes the tokenizer, ``layout`` says how passages and
questions stand in a prompt, ``words`` and ``questions`` make questions from sentences, ``batches``
packs them, ``init`` writes a copying circuit into the first weights, ``train`` trains, ``evaluate``
measures, ``build`` does all of it and writes the folder. ``stages.base_model`` is the stage.
"""
