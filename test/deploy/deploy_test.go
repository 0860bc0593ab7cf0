// Package deploy holds what lies under deploy/ against the programs that it is for.
package deploy

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/acproxy/acproxy/internal/testtools"
)

// TestSystemdUnit has systemd read the unit, and say how much of the machine it leaves to acproxy.
func TestSystemdUnit(t *testing.T) {
	testtools.Need(t, "systemd-analyze")
	content, err := os.ReadFile("../../deploy/systemd/acproxy.service")
	if err != nil {
		t.Fatal(err)
	}
	unit := filepath.Join(t.TempDir(), "acproxy.service")
	// It looks whether the program is there.
	if err := os.WriteFile(unit, []byte(strings.ReplaceAll(string(content), "/usr/bin/acproxy ", "/bin/true ")), 0o644); err != nil {
		t.Fatal(err)
	}
	socket, err := os.ReadFile("../../deploy/systemd/acproxy.socket")
	if err != nil {
		t.Fatal(err)
	}
	// It looks for the service beside the socket.
	socketUnit := filepath.Join(filepath.Dir(unit), "acproxy.socket")
	if err := os.WriteFile(socketUnit, socket, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{unit, socketUnit} {
		if out, err := exec.Command("systemd-analyze", "verify", name).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("systemd-analyze verify: %v\n%s", err, out)
		}
	}
	// A tenth of it is what systemd calls the exposure: 2 of 10 is little for what listens and dials.
	if out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", unit).CombinedOutput(); err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
}

// TestAlertsAndDashboard reads both as what they are.
func TestAlertsAndDashboard(t *testing.T) {
	content, err := os.ReadFile("../../deploy/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var alerts struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For string
				Labels           map[string]string
				Annotations      map[string]string
			}
		}
	}
	if err := yaml.UnmarshalWithOptions(content, &alerts, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	rules := 0
	for _, group := range alerts.Groups {
		for _, rule := range group.Rules {
			rules++
			if rule.Alert == "" || rule.Expr == "" || rule.Labels["severity"] == "" || rule.Annotations["summary"] == "" || rule.Annotations["description"] == "" {
				t.Errorf("the alert %+v says less than it should", rule)
			}
		}
	}
	if rules == 0 {
		t.Error("there are no alerts")
	}
	content, err = os.ReadFile("../../deploy/grafana/acproxy.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			ID      int
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(content, &dashboard); err != nil {
		t.Fatal(err)
	}
	taken := make(map[[2]int]string)
	for _, p := range dashboard.Panels {
		if p.Title == "" || len(p.Targets) == 0 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("the panel %+v is not whole", p)
		}
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("%s lies on %s", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
	}
}
