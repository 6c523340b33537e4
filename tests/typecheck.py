"""The type checker that the tests put on every function of `lm`."""

import beartype

# An int is taken where a float is asked for, as the typing documentation has it.
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
