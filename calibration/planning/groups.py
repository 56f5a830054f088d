"""Disjoint sets of things that must be treated alike (union-find with path halving; Tarjan and van Leeuwen, 1984)."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Groups(Generic[T]):
    """Disjoint sets (union-find with path halving); the root of a set is its earliest added member."""

    def __init__(self) -> None:
        self._parent: dict[T, T] = {}
        self._order: dict[T, int] = {}

    def add(self, item: T) -> None:
        """Makes `item` a set of its own unless it is in one."""
        if item not in self._parent:
            self._parent[item] = item
            self._order[item] = len(self._order)

    def __contains__(self, item: T) -> bool:
        return item in self._parent

    def root(self, item: T) -> T:
        """The member that stands for the whole set."""
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, a: T, b: T) -> T:
        """The root of the set that holds both from now on."""
        self.add(a)
        self.add(b)
        first, second = sorted((self.root(a), self.root(b)), key=lambda item: self._order[item])
        self._parent[second] = first
        return first

    def members(self) -> list[list[T]]:
        """All sets, each in the order of adding."""
        sets: dict[T, list[T]] = {}
        for item in self._parent:
            sets.setdefault(self.root(item), []).append(item)
        return list(sets.values())
