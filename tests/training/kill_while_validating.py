"""`python -m tests.training.kill_while_validating STEP RECIPE ...`: training is killed amid the validation of STEP."""

import os
import signal
import sys

from echo4o.training import validation
from echo4o.training.train import main

_evaluate, _sums = validation.Validator.evaluate, validation.sample_sums
step = int(sys.argv[1])


def evaluate(self, model, at, stop_requested):
    if at == step:
        validation.sample_sums = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return _evaluate(self, model, at, stop_requested)


validation.Validator.evaluate = evaluate
sys.exit(main(sys.argv[2:]))
