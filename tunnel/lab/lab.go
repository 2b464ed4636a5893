// Package lab builds small networks on one machine: network namespaces joined
// by veth pairs, packet captures with a search in them, and a relay that
// loses, delays and reorders. The demo, the benchmarks and the tests use it.
//
// The way in is [Reexec]: it runs the program again inside namespaces of its
// own, so that root is not needed where the kernel allows that, and nothing is
// left behind however the program ends: every namespace hangs on a process or
// a file descriptor, none has a name in the file system. Inside, [NewNamespace]
// and [Veth] build the network, [Namespace.Do] and [Namespace.Start] put code
// and processes into it.
//
// A caller must keep in mind that a network namespace belongs to an OS thread:
// sockets are made inside Do, and a goroutine started there is elsewhere.
package lab
