"""What a step takes on named devices, predicted: the roofline and link model of `headwise plan`.

`prediction.predict` is the way in; docs/cost_model.md states the formulas. Neither torch nor ray is
imported, except by `measurement`, which measures this host's processor on request.
"""
