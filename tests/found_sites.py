"""What is found in a network, by the names of its sites."""

from __future__ import annotations

from hosts import photos

from lcc.surgery import find_sites


def sites_of(model, x=None):
    """Return the sites of a network by name."""
    return {site.name: site for site in find_sites(model, photos(1) if x is None else x)}


def convs_of(model, x=None):
    return {name: site for name, site in sites_of(model, x).items() if site.kind == "conv"}


def norms_of(model, x=None):
    return {name: site.norm for name, site in convs_of(model, x).items()}


def obstacle_of(model, name="conv"):
    return sites_of(model)[name].obstacle
