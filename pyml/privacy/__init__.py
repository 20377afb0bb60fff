"""Privacy accounting of Gaussian noise that differs from element to element.

`effective_multiplier` says which isotropic noise is exactly as private, `epsilon` what a run has spent and
`noise_multiplier` which noise a target needs; `History` is saved with the optimizer. Scales and their provenance:
`uniform`, `from_public_gradients`, `from_parameters`, `noise_power_gain`, `dp`. Noise on a grid from a secret key:
`secure_sum`, `secure_noise`, `secure_batch`; `new_key`, `noise_kind`. Checks from below: `audit_membership`,
`audit_one_run`.
"""

from pyml.privacy.accounting import Epsilon, epsilon, noise_multiplier
from pyml.privacy.auditing import Audit, OneRunAudit, audit_membership, audit_one_run
from pyml.privacy.history import History
from pyml.privacy.multipliers import effective_multiplier
from pyml.privacy.provenance import Provenance, dp
from pyml.privacy.scales import Scale, from_parameters, from_public_gradients, noise_power_gain, uniform
from pyml.privacy.secure import SecureSum, new_key, noise_kind, secure_batch, secure_noise, secure_sum

__all__ = [
    "Audit", "Epsilon", "History", "OneRunAudit", "Provenance", "Scale", "SecureSum", "audit_membership",
    "audit_one_run", "dp", "effective_multiplier", "epsilon", "from_parameters", "from_public_gradients", "new_key",
    "noise_kind", "noise_multiplier", "noise_power_gain", "secure_batch", "secure_noise", "secure_sum", "uniform",
]  # fmt: skip
