"""Cache salts: they separate tenants, and pages that are computed with adapters from all others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.adapters import adapter_cache_salt

NAMES = st.lists(st.one_of(st.none(), st.sampled_from(["a" * 32, "b" * 32])), max_size=3)
SALTS = st.one_of(st.text(max_size=4), st.sampled_from(["", "\n", "1 ", "1 \n" + "a" * 32]))


@given(SALTS, NAMES, SALTS, NAMES)
def test_different_tenants_or_adapters_give_different_salts(
    salt: str, names: list[str | None], other: str, others: list[str | None]
) -> None:
    plain, others_plain = not any(names), not any(others)
    same = salt == other and (names == others or (plain and others_plain))
    assert (adapter_cache_salt(salt, names) == adapter_cache_salt(other, others)) == same


@given(SALTS, NAMES)
def test_no_tenant_salt_without_adapters_gives_the_salt_of_adapters(salt: str, names: list[str | None]) -> None:
    with_adapters = adapter_cache_salt(salt, [*names, "a" * 32])
    assert adapter_cache_salt(with_adapters, ()) != with_adapters
