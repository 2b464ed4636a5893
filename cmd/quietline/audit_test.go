package main

import "testing"

func TestAudit(t *testing.T) { script(t, "audit") }
