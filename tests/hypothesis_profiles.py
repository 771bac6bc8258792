"""How hard the state machines look. `MINI_INFER_HYPOTHESIS=long pytest ...` looks longer, at other examples each time.

The standard profile always runs the same examples, so that a red run is red for everybody.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_UNHURRIED = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}

settings.register_profile("standard", max_examples=2000, stateful_step_count=50, derandomize=True, **_UNHURRIED)
settings.register_profile("long", max_examples=5000, stateful_step_count=100, **_UNHURRIED)

STATE_MACHINE = settings.get_profile(os.environ.get("MINI_INFER_HYPOTHESIS", "standard"))
"""For state machines: ``TestX.settings = STATE_MACHINE``."""

PROPERTY = settings(STATE_MACHINE, max_examples=max(200, STATE_MACHINE.max_examples // 5))
"""For plain properties: ``@PROPERTY``."""
