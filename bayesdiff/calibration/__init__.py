"""Are the numbers true? Metrics of predictive distributions, models of what the data leave open, and the evaluation of both."""

from bayesdiff.calibration.metrics import CRPS as CRPS
from bayesdiff.calibration.metrics import ENCE as ENCE
from bayesdiff.calibration.metrics import GaussianNLL as GaussianNLL
from bayesdiff.calibration.metrics import IntervalCoverage as IntervalCoverage
from bayesdiff.calibration.metrics import PITHistogram as PITHistogram
from bayesdiff.calibration.metrics import Sharpness as Sharpness
from bayesdiff.calibration.ranking import RiskCoverage as RiskCoverage
from bayesdiff.calibration.ranking import Sparsification as Sparsification
from bayesdiff.calibration.ranking import Spearman as Spearman
from bayesdiff.calibration.shapes import Prediction as Prediction
