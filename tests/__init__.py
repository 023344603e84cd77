"""Tests of jkoflow."""
