"""A choice for ``deploy_passes`` that asks nothing."""

from sparseforge_fx.kernels.layouts import ROWS
from sparseforge_fx.passes.find_linears import eligible


def all_in_rows(sites):
    return all_in(ROWS)(sites)


def all_in(layout):
    """Every eligible site, in this layout."""
    return lambda sites: {site.fqn: layout for site in eligible(sites)}
