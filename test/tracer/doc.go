// Package tracer runs a program and makes its calls on the files under a directory go wrong: each of them can fail, be cut short or be the last
// thing that the program did.
//
// It counts the system calls of all threads together, in the order in which they begin, where strace counts those of each thread and of each kind
// apart; a Go program moves its goroutines from thread to thread, so that "the tenth call" is a place that only the former finds again. It works on
// Linux on amd64.
package tracer
