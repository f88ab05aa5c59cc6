"""What is known of GPU architectures, and what is compiled for one that is not."""

from __future__ import annotations

import warnings

import pytest

from collogue.errors import PlatformError
from collogue.planning.architecture import ARCHITECTURES, COVERED, architecture_of, has_clusters, nearest, target

NVRTC_12_8 = (75, 80, 86, 87, 89, 90, 100, 101, 120)
NVRTC_13_0 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


def test_every_gpu_since_ampere_is_known() -> None:
    names = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_110a", "sm_120a", "sm_121a"]
    assert list(ARCHITECTURES) == names
    assert set(COVERED) < set(names)
    assert [architecture_of(one.capability) for one in ARCHITECTURES.values()] == names
    assert [name for name in names if not has_clusters(name)] == names[:4]
    assert [one.has_e4m3 for one in ARCHITECTURES.values()] == [False] * 3 + [True] * 7
    assert [one.has_e2m1 for one in ARCHITECTURES.values()] == [False] * 5 + [True] * 5
    assert [name for name, one in ARCHITECTURES.items() if one.status == "measured"] == ["sm_90a"]


def test_a_gpu_that_is_too_old() -> None:
    with pytest.raises(PlatformError, match=r"7\.5 is too old"):
        architecture_of((7, 5))


@pytest.mark.parametrize(
    ("capability", "name", "family"),
    [((8, 8), "sm_88", "sm_86"), ((9, 1), "sm_91", "sm_90a"), ((10, 7), "sm_107", "sm_103a"), ((13, 0), "sm_130", "sm_121a")],
)
def test_a_gpu_that_is_newer_gets_its_familys_code_with_a_warning(capability: tuple[int, int], name: str, family: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"{capability[0]}\.{capability[1]} is unknown .* family of {family}, which was never"):
        assert architecture_of(capability) == name
    assert nearest(capability).name == family
    assert has_clusters(name) == (capability >= (9, 0))


def test_a_known_gpu_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert architecture_of((12, 1)) == "sm_121a"


@pytest.mark.parametrize(
    ("architecture", "supported", "compiled"),
    [
        ("sm_90a", NVRTC_12_8, "sm_90a"),
        ("sm_103a", NVRTC_13_0, "sm_103a"),
        ("sm_103a", NVRTC_12_8, "sm_100"),
        ("sm_121a", NVRTC_12_8, "sm_120"),
        ("sm_110a", NVRTC_12_8, "compute_100"),  # machine code of another major version does not run, nor a Jetson's
        ("sm_87", (80, 86, 89), "compute_86"),
        ("sm_107", NVRTC_13_0, "sm_103"),
        ("sm_107", (*NVRTC_13_0, 107), "sm_107"),
        ("sm_130", NVRTC_13_0, "compute_121"),
    ],
)
def test_what_is_compiled_where_the_compiler_does_not_know_the_gpu(architecture: str, supported: tuple[int, ...], compiled: str) -> None:
    assert target(architecture, supported) == compiled


def test_a_compiler_that_knows_nothing_old_enough() -> None:
    with pytest.raises(PlatformError, match="NVRTC cannot compile for sm_80"):
        target("sm_80", (75, 90))
