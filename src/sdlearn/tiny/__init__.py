"""Our emoji world: its scenes, how its model is trained, judged and measured."""
