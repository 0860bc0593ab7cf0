package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

// kinds are what the manifests may hold, and the Go types that the API server decodes them into.
func kinds() map[string]func() metav1.Object {
	return map[string]func() metav1.Object{
		"v1/Namespace":                       func() metav1.Object { return new(corev1.Namespace) },
		"v1/ServiceAccount":                  func() metav1.Object { return new(corev1.ServiceAccount) },
		"v1/ConfigMap":                       func() metav1.Object { return new(corev1.ConfigMap) },
		"v1/Service":                         func() metav1.Object { return new(corev1.Service) },
		"apps/v1/StatefulSet":                func() metav1.Object { return new(appsv1.StatefulSet) },
		"apps/v1/DaemonSet":                  func() metav1.Object { return new(appsv1.DaemonSet) },
		"networking.k8s.io/v1/NetworkPolicy": func() metav1.Object { return new(networkingv1.NetworkPolicy) },
		"policy/v1/PodDisruptionBudget":      func() metav1.Object { return new(policyv1.PodDisruptionBudget) },
	}
}

// manifests returns what kustomize makes of a directory, decoded as strictly as the API server does with --validate=strict.
func manifests(t *testing.T, dir string) map[string]metav1.Object {
	t.Helper()
	made, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join("../kubernetes", dir))
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]metav1.Object)
	for _, resource := range made.Resources() {
		text, err := resource.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		kind := strings.TrimPrefix(resource.GetGvk().Group+"/"+resource.GetGvk().Version+"/"+resource.GetKind(), "/")
		object := kinds()[kind]
		if object == nil {
			t.Errorf("nobody looks at a %s", kind)
			continue
		}
		o := object()
		if err := yaml.UnmarshalStrict(text, o); err != nil {
			t.Errorf("%s %s: %v", kind, resource.GetName(), err)
			continue
		}
		out[resource.GetKind()+"/"+resource.GetName()] = o
	}
	return out
}

// pods returns the pod template of each workload.
func pods(all map[string]metav1.Object) map[string]corev1.PodTemplateSpec {
	out := make(map[string]corev1.PodTemplateSpec)
	for name, o := range all {
		switch o := o.(type) {
		case *appsv1.StatefulSet:
			out[name] = o.Spec.Template
		case *appsv1.DaemonSet:
			out[name] = o.Spec.Template
		}
	}
	return out
}

// TestManifests holds what kustomize makes against the API's types, and the parts against each other: what kubectl would only find out in a cluster.
func TestManifests(t *testing.T) {
	for dir, want := range map[string][]string{
		"base":                  {"ConfigMap", "Namespace", "NetworkPolicy", "PodDisruptionBudget", "Service", "Service", "ServiceAccount", "StatefulSet"},
		"local-ca":              {"ConfigMap", "Namespace", "NetworkPolicy", "PodDisruptionBudget", "Service", "Service", "ServiceAccount", "StatefulSet"},
		"node-cache":            {"ConfigMap", "DaemonSet", "Namespace"},
		"node-cache-persistent": {"ConfigMap", "DaemonSet", "Namespace"},
	} {
		t.Run(dir, func(t *testing.T) {
			all := manifests(t, dir)
			var found []string
			namespace := ""
			for name, o := range all {
				kind, _, _ := strings.Cut(name, "/")
				found = append(found, kind)
				if kind == "Namespace" {
					namespace = o.GetName()
				}
			}
			slices.Sort(found)
			if !slices.Equal(found, want) {
				t.Errorf("it makes %q, want %q", found, want)
			}
			for name, o := range all {
				if o.GetNamespace() != namespace && !strings.HasPrefix(name, "Namespace/") {
					t.Errorf("%s is in the namespace %q, not in %q", name, o.GetNamespace(), namespace)
				}
			}
			for name, pod := range pods(all) {
				checkPod(t, name, pod, all)
			}
			checkSelectors(t, all)
		})
	}
}

// checkPod wants what the restricted level of pod security asks for, and everything that is named to be there.
func checkPod(t *testing.T, name string, pod corev1.PodTemplateSpec, all map[string]metav1.Object) {
	t.Helper()
	spec := pod.Spec
	if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Errorf("%s gets a token for the API", name)
	}
	if sc := spec.SecurityContext; sc == nil || sc.RunAsNonRoot == nil || !*sc.RunAsNonRoot || *sc.RunAsUser != user || *sc.FSGroup != user || sc.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("%s runs as %+v", name, sc)
	}
	if spec.HostNetwork || spec.HostPID || spec.HostIPC {
		t.Errorf("%s shares namespaces with its node", name)
	}
	volumes := make(map[string]corev1.Volume)
	for _, v := range spec.Volumes {
		volumes[v.Name] = v
		if cm := v.ConfigMap; cm != nil && (cm.Optional == nil || !*cm.Optional) {
			o, ok := all["ConfigMap/"+cm.Name].(*corev1.ConfigMap)
			if !ok || o.Data["config.yaml"] == "" {
				t.Errorf("%s mounts the ConfigMap %s, which isn't there or has no config.yaml", name, cm.Name)
			}
		}
	}
	if set, ok := all[name].(*appsv1.StatefulSet); ok {
		for _, claim := range set.Spec.VolumeClaimTemplates {
			volumes[claim.Name] = corev1.Volume{Name: claim.Name}
		}
		if all["Service/"+set.Spec.ServiceName] == nil {
			t.Errorf("%s wants its names from the Service %s, which isn't there", name, set.Spec.ServiceName)
		}
	}
	for _, c := range spec.Containers {
		sc := c.SecurityContext
		if sc == nil || *sc.AllowPrivilegeEscalation || !*sc.ReadOnlyRootFilesystem || !reflect.DeepEqual(sc.Capabilities, &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}) {
			t.Errorf("%s: %s may do %+v", name, c.Name, sc)
		}
		if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().IsZero() {
			t.Errorf("%s: %s doesn't say what it needs", name, c.Name)
		}
		if !strings.HasPrefix(c.Image, "registry.example.com/acproxy:") {
			t.Errorf("%s has the image %s, which kustomize didn't replace", name, c.Image)
		}
		ports := make(map[string]bool)
		for _, p := range c.Ports {
			ports[p.Name] = true
			if p.HostPort != 0 && p.HostIP != "127.0.0.1" {
				t.Errorf("%s opens port %d of its node to others", name, p.HostPort)
			}
		}
		for _, probe := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
			if probe == nil || probe.HTTPGet == nil || !ports[probe.HTTPGet.Port.StrVal] {
				t.Errorf("%s: %s has a probe %+v", name, c.Name, probe)
			}
		}
		mounted := make(map[string]bool)
		for _, m := range c.VolumeMounts {
			if _, ok := volumes[m.Name]; !ok {
				t.Errorf("%s mounts %s, which is no volume", name, m.Name)
			}
			mounted[m.Name] = true
			// In a ConfigMap or Secret no directory can be made to mount something at.
			for _, other := range c.VolumeMounts {
				if strings.HasPrefix(m.MountPath, other.MountPath+"/") {
					t.Errorf("%s mounts %s inside of %s", name, m.MountPath, other.MountPath)
				}
			}
		}
		for v := range volumes {
			if !mounted[v] {
				t.Errorf("%s has the volume %s and mounts it nowhere", name, v)
			}
		}
		// Go has to know the limit before the kernel does.
		for _, env := range c.Env {
			var mib int64
			if _, err := fmt.Sscanf(env.Value, "%dMiB", &mib); env.Name == "GOMEMLIMIT" && (err != nil || mib<<20 >= c.Resources.Limits.Memory().Value() || mib<<20 < c.Resources.Limits.Memory().Value()/2) {
				t.Errorf("%s: GOMEMLIMIT is %s, and the limit %v", name, env.Value, c.Resources.Limits.Memory())
			}
		}
	}
}

// checkSelectors wants each selector to select pods that are there, and each port that is named to be one of theirs.
func checkSelectors(t *testing.T, all map[string]metav1.Object) {
	t.Helper()
	selected := func(what string, labels map[string]string, ports ...intstr.IntOrString) {
		t.Helper()
		count := 0
		for _, pod := range pods(all) {
			matches := len(labels) > 0
			for k, v := range labels {
				matches = matches && pod.Labels[k] == v
			}
			if !matches {
				continue
			}
			count++
			for _, port := range ports {
				if !slices.ContainsFunc(pod.Spec.Containers[0].Ports, func(p corev1.ContainerPort) bool { return p.Name == port.StrVal }) {
					t.Errorf("%s means the port %v, which its pods don't have", what, port.String())
				}
			}
		}
		if count != 1 {
			t.Errorf("%s selects the pods of %d workloads by %v", what, count, labels)
		}
	}
	for name, o := range all {
		switch o := o.(type) {
		case *corev1.Service:
			var ports []intstr.IntOrString
			for _, p := range o.Spec.Ports {
				ports = append(ports, p.TargetPort)
			}
			selected(name, o.Spec.Selector, ports...)
		case *policyv1.PodDisruptionBudget:
			selected(name, o.Spec.Selector.MatchLabels)
		case *networkingv1.NetworkPolicy:
			var ports []intstr.IntOrString
			for _, rule := range o.Spec.Ingress {
				for _, p := range rule.Ports {
					ports = append(ports, *p.Port)
				}
			}
			selected(name, o.Spec.PodSelector.MatchLabels, ports...)
		case *appsv1.StatefulSet:
			selected(name, o.Spec.Selector.MatchLabels)
		case *appsv1.DaemonSet:
			selected(name, o.Spec.Selector.MatchLabels)
		}
	}
}

// TestLocalCAIsReached wants port 443 of the Service, and the NetworkPolicy, to lead to where the configuration has acproxy listen with TLS.
func TestLocalCAIsReached(t *testing.T) {
	all := manifests(t, "local-ca")
	service := all["Service/acproxy"].(*corev1.Service)
	ports := make(map[int32]string)
	for _, p := range service.Spec.Ports {
		ports[p.Port] = p.TargetPort.StrVal
	}
	if want := map[int32]string{443: "https", 8080: "http"}; !reflect.DeepEqual(ports, want) {
		t.Errorf("the Service has %v, want %v", ports, want)
	}
	if policy := all["NetworkPolicy/acproxy"].(*networkingv1.NetworkPolicy); len(policy.Spec.Ingress[0].Ports) != 2 {
		t.Errorf("the NetworkPolicy lets %+v through", policy.Spec.Ingress[0].Ports)
	}
	pod := all["StatefulSet/acproxy"].(*appsv1.StatefulSet).Spec.Template.Spec
	var listens []string
	for name, o := range all {
		if cm, ok := o.(*corev1.ConfigMap); ok {
			var cfg struct {
				Listen []struct{ Address, TLS string }
				CA     struct{ Dir string }
			}
			if err := yaml.Unmarshal([]byte(cm.Data["config.yaml"]), &cfg); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, l := range cfg.Listen {
				listens = append(listens, l.Address+" "+l.TLS)
			}
			if !slices.ContainsFunc(pod.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == "ca" && m.MountPath == cfg.CA.Dir }) {
				t.Errorf("the authority is looked for in %s, and mounted elsewhere", cfg.CA.Dir)
			}
		}
	}
	slices.Sort(listens)
	if want := []string{":8080 ", ":8443 local-ca"}; !slices.Equal(listens, want) {
		t.Errorf("it listens at %q, want %q", listens, want)
	}
	for _, v := range pod.Volumes {
		if v.Name == "ca" && *v.Secret.DefaultMode != 0o440 {
			t.Errorf("the authority's key has mode %o", *v.Secret.DefaultMode)
		}
	}
}

// TestNodeCacheFits wants what the cache on a node may take to be less than what the kubelet allows its volume.
func TestNodeCacheFits(t *testing.T) {
	all := manifests(t, "node-cache")
	pod := all["DaemonSet/acproxy-node"].(*appsv1.DaemonSet).Spec.Template.Spec
	content, err := os.ReadFile("../kubernetes/node-cache/config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cfg struct {
		Cache struct {
			MaxSize string `json:"max_size"`
		}
	}
	if err := yaml.Unmarshal(content, &cfg); err != nil {
		t.Fatal(err)
	}
	var gib int64
	if _, err := fmt.Sscanf(cfg.Cache.MaxSize, "%dGiB", &gib); err != nil {
		t.Fatal(err)
	}
	if limit := pod.Volumes[0].EmptyDir.SizeLimit.Value(); gib<<30 >= limit {
		t.Errorf("it may take %s of %d bytes", cfg.Cache.MaxSize, limit)
	}
	persistent := manifests(t, "node-cache-persistent")["DaemonSet/acproxy-node"].(*appsv1.DaemonSet).Spec.Template.Spec
	if v := persistent.Volumes[0]; v.Name != "data" || v.EmptyDir != nil || v.HostPath == nil || *v.HostPath.Type != corev1.HostPathDirectory {
		t.Errorf("what should be kept on the node is in %s", mustJSON(t, v))
	}
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.TrimSpace(b)
}
