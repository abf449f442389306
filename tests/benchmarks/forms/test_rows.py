"""The two forms of a recurrent layer compute the same; how fast they are is no test's business."""

import pytest
import torch

from benchmarks.forms.rows import FORMS


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_both_forms_give_the_same(name: str) -> None:
    forms = FORMS[name]()
    torch.testing.assert_close(forms.parallel(), forms.loop(), rtol=0, atol=forms.tolerance)
