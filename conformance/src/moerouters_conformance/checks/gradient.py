"""Placeholder."""

from moerouters_conformance.rule import Group, RuleBook

book = RuleBook(Group.GRADIENT)
