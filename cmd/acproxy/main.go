// Command acproxy is an image discovery and caching registry proxy for appc images.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // what was asked could not be done, or the answer is no
	exitUsage  = 2 // what was asked could not be understood
	exitPartly = 3 // some of what was asked was done, and some could not be
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// interruptible returns a context that the first signal to stop ends. A second one ends the process at once, however soon after the first it comes.
func interruptible() (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals, done := make(chan os.Signal, 2), make(chan struct{})
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	// Ends when stop is called, which waits for nothing: it has nothing left to do then.
	go func() {
		for range 2 {
			select {
			case s := <-signals:
				if ctx.Err() == nil {
					cancel()
					continue
				}
				// As if nobody had asked to be told of it.
				signal.Reset(os.Interrupt, syscall.SIGTERM)
				if self, err := os.FindProcess(os.Getpid()); err == nil {
					_ = self.Signal(s)
				}
			case <-done:
				return
			}
		}
	}()
	return ctx, sync.OnceFunc(func() {
		signal.Stop(signals)
		cancel()
		close(done)
	})
}

// run runs one command and returns its exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := interruptible()
	defer stop()

	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	var usage *usageError
	var coded *exitError
	ofItsOwn := errors.As(err, &coded)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "acproxy: %v\nTry: %s --help\n", err, cmd.CommandPath())
		if ofItsOwn {
			return coded.code
		}
		return exitUsage
	}
	if !isSilent(err) {
		printError(stderr, err)
	}
	if ofItsOwn {
		return coded.code
	}
	var partly *partlyError
	if errors.As(err, &partly) {
		return exitPartly
	}
	return exitFailed
}

// printError prints an error for a person: the reason, then what was tried.
func printError(w io.Writer, err error) {
	fmt.Fprintf(w, "acproxy: %v\n", err)
	var e *acproxy.Error
	if errors.As(err, &e) && len(e.Trace) > 0 {
		fmt.Fprintln(w, "What was tried:")
		for i, a := range e.Trace {
			fmt.Fprintf(w, "%3d. %v\n", i+1, a)
		}
	}
}

// usageError is a command line that can't be understood.
type usageError struct{ err error }

// Error returns what is wrong with the command line.
func (e *usageError) Error() string { return e.err.Error() }

// Unwrap returns the cause.
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// partlyError ends a command that has done some of what was asked.
type partlyError struct{ error }

// Unwrap returns the cause.
func (e *partlyError) Unwrap() error { return e.error }

func partly(err error) error { return &partlyError{err} }

// args turns cobra's complaint about arguments into a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &usageError{err}
		}
		return nil
	}
}

func newRoot() *cobra.Command {
	o := new(options)
	root := &cobra.Command{
		Use:   "acproxy",
		Short: "An image discovery and caching registry proxy for appc images",
		Long: `acproxy finds appc images by meta-discovery, fetches each of them and its OpenPGP signature once, decides whether a trusted key signed it,
keeps exactly those bytes and serves them to every node, online or offline.

  acproxy demo     shows the whole job on this machine
  acproxy serve    runs the server`,
		SilenceUsage:  true,
		SilenceErrors: true,
		// An unknown command is a usage error like any other.
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.PersistentFlags().StringVar(&o.dataDir, "data-dir", "", "directory for everything acproxy keeps (default: data_dir of the configuration, else "+defaultDataDirText+")")
	root.PersistentFlags().StringVar(&o.configFile, "config", "", "configuration file (default: none, all defaults)")
	root.AddCommand(
		newServe(o), newDemo(), newDrill(), newOnSmallDisk(), newDiscover(o), newTrust(o), newToken(o), newVerify(o), newCA(o), newImages(o), newPin(o, true), newPin(o, false), newGC(o), newUsage(o), newRefusals(o), newPublishers(o), newFlights(o), newEvents(o), newConfig(o), newHealthcheck(o), newReload(o), newScrub(o), newFsck(o), newVersion(), newMan(), newExport(o), newImport(o), newWarm(o), newFetch(o), newMissing(o), newPush(o),
	)
	o.completeArguments(root)
	return root
}
