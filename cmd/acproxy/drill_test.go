package main

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
)

// TestDrillInterrupted sends what Ctrl-C sends while a server of the drill runs.
func TestDrillInterrupted(t *testing.T) {
	for name, signal := range map[string]syscall.Signal{"by Ctrl-C": syscall.SIGINT, "by SIGTERM": syscall.SIGTERM} {
		t.Run(name, func(t *testing.T) {
			tmp := t.TempDir()
			cmd, stdout := startDrill(t, tmp)
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			for stdout.Scan() {
				// To its end, so that it isn't the reader who stops it.
			}
			var exit *exec.ExitError
			if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitFailed {
				t.Errorf("the drill ended with %v, want exit code %d", err, exitFailed)
			}
			if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
			if left := processesIn(t, tmp); len(left) > 0 {
				t.Errorf("processes left behind: %q", left)
			}
		})
	}
}

// TestDrillKilled kills the drill itself, which then can't end its server: the kernel does.
func TestDrillKilled(t *testing.T) {
	tmp := t.TempDir()
	cmd, _ := startDrill(t, tmp)
	if len(processesIn(t, tmp)) == 0 {
		t.Fatal("no server of the drill is found, so that this test finds nothing")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	// Its end is the kernel's work, and nobody is told.
	for deadline := time.Now().Add(10 * time.Second); len(processesIn(t, tmp)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("processes left behind: %q", processesIn(t, tmp))
		}
	}
}

// startDrill starts a drill that waits for a key to expire, and returns when its server runs.
func startDrill(t *testing.T, tmp string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.Command("acproxy", "drill", "--only", "expired-key")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "GORACE=atexit_sleep_ms=20")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	stdout := bufio.NewScanner(out)
	for stdout.Scan() {
		if strings.Contains(stdout.Text(), "to be held from now on") {
			return cmd, stdout
		}
	}
	t.Fatalf("the drill ended before it held an image: %v\n%s", cmd.Wait(), &stderr)
	return nil, nil
}

// processesIn returns the command lines of all servers that have something to do with a directory.
func processesIn(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(files) == 0 {
		t.Skip("processes are not to be seen here")
	}
	var out []string
	for _, file := range files {
		line, _ := os.ReadFile(file) // a process that has ended since has nothing left behind
		if strings.Contains(string(line), dir) {
			out = append(out, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return out
}

// TestAlarmsOfTheDrillAreAlerts holds the alerts that the drill names against deploy/prometheus/alerts.yaml.
func TestAlarmsOfTheDrillAreAlerts(t *testing.T) {
	content, err := os.ReadFile("../../deploy/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr, For string
				Labels           map[string]string
			}
		}
	}
	if err := yaml.Unmarshal(content, &file); err != nil {
		t.Fatal(err)
	}
	lasting := map[string]string{"": "", "10m": "10 minutes", "15m": "15 minutes"}
	for _, al := range []alarm{alarmPublisherDown, alarmDamage, alarmNoRoom, alarmRefused, alarmDistrusted} {
		found := false
		for _, rule := range file.Groups[0].Rules {
			if rule.Alert != al.name {
				continue
			}
			found = true
			if !strings.Contains(rule.Expr, al.metric) || !strings.Contains(rule.Expr, al.label) || rule.Labels["severity"] != al.severity || lasting[rule.For] != al.after {
				t.Errorf("the alert is %+v, and the drill takes it for %+v", rule, al)
			}
		}
		if !found {
			t.Errorf("there is no alert %s", al.name)
		}
	}
}
