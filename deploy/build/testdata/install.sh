# What an administrator does with the package, one after the other. It runs inside of a copy of a machine.
say() { echo "== $*"; }
fail() { echo "FAILED: $*"; exit 1; }

say install
dpkg --install /first.deb
test "$(dpkg-query --show --showformat '${Status} ${Version}' acproxy)" = "install ok installed 1.2.3~rc.1"
test "$(stat -c '%a %U:%G' /usr/bin/acproxy)" = "755 root:root"
test "$(stat -c '%a %U:%G' /etc/acproxy/trustedkeys)" = "755 root:root"
# Enabled, as policy has it.
test -L /etc/systemd/system/multi-user.target.wants/acproxy.service || fail "it is not enabled"
if command -v systemd-analyze >/dev/null; then systemd-analyze verify /usr/lib/systemd/system/acproxy.service; fi
if command -v man >/dev/null; then MANWIDTH=80 man acproxy-trust-add | grep -q 'Trust\|trust the keys'; fi

# What systemd does for DynamicUser= and StateDirectory=.
start() {
  mkdir -p /var/lib/private/acproxy
  chmod 700 /var/lib/private /var/lib/private/acproxy
  chown 64999:64999 /var/lib/private/acproxy
  chmod 755 /var/lib/private
  ln -sfn private/acproxy /var/lib/acproxy
  command=$(sed -n 's/^ExecStart=//p' /usr/lib/systemd/system/acproxy.service)
  # shellcheck disable=SC2086
  setpriv --reuid 64999 --regid 64999 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all --reset-env $command >/tmp/log 2>&1 &
  server=$!
  for _ in $(seq 100); do
    if curl -fsS -o /dev/null http://127.0.0.1:8080/.acproxy/readyz 2>/dev/null; then return; fi
    kill -0 "$server" 2>/dev/null || { cat /tmp/log; fail "it has ended"; }
    sleep 0.1
  done
  cat /tmp/log
  fail "it doesn't answer"
}
stop() {
  kill -TERM "$server"
  wait "$server" || { cat /tmp/log; fail "it ended with $?"; }
}

say start
start
test "$(curl -fsS http://127.0.0.1:8080/.acproxy/healthz)" = ok
# Commands find it without being told where it is, and the packaged configuration is one that they can read.
acproxy healthcheck
acproxy usage | grep -q 'together'
acproxy reload --config /etc/acproxy/config.yaml
say 'trust a key, as root'
acproxy trust add --config /etc/acproxy/config.yaml --prefix example.com --yes /key.asc
fingerprint=$(ls /etc/acproxy/trustedkeys/prefix.d/example.com)
curl -fsS -o /dev/null "http://127.0.0.1:8080/.acproxy/keys/$fingerprint.asc" || fail "the service doesn't see the key"
say stop
stop
test "$(stat -c %u /var/lib/private/acproxy/store)" = 64999

say 'upgrade, with a configuration that was changed'
echo '# mine' >> /etc/acproxy/config.yaml
touch /var/lib/private/acproxy/kept
dpkg --install /later.deb
test "$(dpkg-query --show --showformat '${Version}' acproxy)" = "1.2.3"
grep -q '^# mine$' /etc/acproxy/config.yaml || fail "the configuration was replaced"
test -e /var/lib/acproxy/kept || fail "what it kept is gone"

say 'a local CA and a token, made by root, for a service that is somebody else'
acproxy ca init --config /etc/acproxy/config.yaml --host example.com >/dev/null
acproxy token add --config /etc/acproxy/config.yaml robot >/dev/null
sed -i 's/^  - address: 127.0.0.1:8080$/&\n  - address: 127.0.0.1:8443\n    tls: local-ca/' /etc/acproxy/config.yaml
start
acproxy ca show --pem --config /etc/acproxy/config.yaml > /tmp/ca.pem
test "$(curl -fsS --cacert /tmp/ca.pem --connect-to example.com:443:127.0.0.1:8443 https://example.com/.acproxy/healthz)" = ok || fail "it doesn't answer as example.com"
stop

say remove
dpkg --remove acproxy
test ! -e /usr/bin/acproxy
test -e /etc/acproxy/config.yaml || fail "removing takes the configuration"
test -e "/etc/acproxy/trustedkeys/prefix.d/example.com/$fingerprint" || fail "removing takes the keys"
test -e /var/lib/acproxy/kept || fail "removing takes what it kept"

say 'install again, and purge'
dpkg --install /later.deb
grep -q '^# mine$' /etc/acproxy/config.yaml
test -L /etc/systemd/system/multi-user.target.wants/acproxy.service || fail "it is not enabled any more"
dpkg --purge acproxy
for left in /etc/acproxy /var/lib/acproxy /var/lib/private/acproxy /etc/systemd/system/multi-user.target.wants/acproxy.service; do
  if [ -e "$left" ] || [ -L "$left" ]; then fail "purging leaves $left"; fi
done
if dpkg-query --show acproxy 2>/dev/null; then fail "dpkg still knows it"; fi
rm /first.deb /later.deb /install.sh /key.asc
