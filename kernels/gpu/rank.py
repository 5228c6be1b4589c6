def rank(*a, **k): raise NotImplementedError
