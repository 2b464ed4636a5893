package main

import "testing"

func TestCheck(t *testing.T) { script(t, "check") }
