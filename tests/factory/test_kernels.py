import pytest

from factory import cosine, jaccard, kernels
from factory.errors import GristmillError


def test_without_numba_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "njit", None)

    @kernels.kernel
    def add(one: int, other: int) -> int:
        return one + other

    with pytest.raises(GristmillError, match="pip install numba"):
        add(1, 2)


def test_all_kernels_compile_beforehand() -> None:
    kernels.compile_all()
    for compiled in (jaccard._sketch, jaccard._prefixes, jaccard._join, cosine._project, cosine._compare):
        assert compiled.signatures
