"""How good a network is: fidelity to a reference and accuracy on labels."""

from dither.evaluation.classification import Evaluation, evaluate_classifier, predict
from dither.evaluation.fidelity import agreement, kl_divergence, sqnr_db, top1

__all__ = ["Evaluation", "agreement", "evaluate_classifier", "kl_divergence", "predict", "sqnr_db", "top1"]
